"""The operations that decide how fast a network is, each in the form that its backend computes fastest."""
