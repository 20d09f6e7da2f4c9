"""Reading and writing: models and their weights, images, the hub, and what the processes of a run tell each other."""
