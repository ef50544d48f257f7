"""Templates: what they are made of, how they are built, and the images that come of it."""
