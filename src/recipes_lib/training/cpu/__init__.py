"""What exists only for machines without a GPU: nothing here runs where there is one."""
