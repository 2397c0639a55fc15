"""Few rows times one layer of stacked weights, at the speed at which the weights can be read."""
