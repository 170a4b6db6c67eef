"""Studies: arms trained with several seeds, evaluated alike, compared once everything is there."""
