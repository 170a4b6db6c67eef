"""From a YAML file to the keyword arguments of TRL, PEFT and transformers."""
