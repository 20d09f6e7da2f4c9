"""The performance-critical operations, each in the form that its backend computes fastest."""
