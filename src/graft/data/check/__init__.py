"""What a model will really see of a data set: facts, faults and rules of `graft data check`."""
