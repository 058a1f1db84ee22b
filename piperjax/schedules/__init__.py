"""Pipeline schedules as validated tables: what runs where and when. Imports no JAX."""
