"""Published trajectories that come with the install; each file names where its numbers are from."""
