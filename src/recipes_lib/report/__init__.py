"""The report: what a comparison found, as one HTML file, Markdown, LaTeX, CSV and JSON. Reads
files, never models.

The same stored rows give the same bytes: nothing here looks at the clock, the machine or the
checkout.
"""
