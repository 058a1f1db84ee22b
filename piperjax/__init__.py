"""PiperJAX: mixture-of-experts training on clusters whose network is not uniform."""
