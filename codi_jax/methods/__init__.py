"""The methods: one file of pure functions each, to be read next to the paper it names."""
