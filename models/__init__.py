"""What is trained: model configurations, their costs, and the layers that compute them."""
