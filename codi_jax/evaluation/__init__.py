"""Metrics of generated images, the features they need, and the report that shows them."""
