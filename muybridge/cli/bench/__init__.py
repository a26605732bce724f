"""Ways of doing a job, held against one another: what the demo and the scoreboards are made of."""
