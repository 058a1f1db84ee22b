"""Running a plan: sharding, dispatch, kernels and the executor."""
