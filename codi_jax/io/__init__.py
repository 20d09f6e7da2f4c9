"""Reading and writing: models and their weights, images, the hub, and communication between the processes of a run."""
