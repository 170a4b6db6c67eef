"""What is done with weights: finding and naming a base, checking, loading, merging, exporting."""
