"""What every other package may use: errors, files, the terminal, and where runs lie."""
