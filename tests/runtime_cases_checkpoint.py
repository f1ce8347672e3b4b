"""What ranks do in the tests of weights: initialise, load, save, restore."""
