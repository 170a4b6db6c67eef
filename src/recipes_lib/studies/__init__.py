"""Studies: arms that differ in declared factors, trained, evaluated and compared; what is said about them comes from tests alone."""
