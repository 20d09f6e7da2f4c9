"""The methods: one file each, of pure functions, to be read against the paper that it names."""
