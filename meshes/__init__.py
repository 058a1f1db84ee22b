"""What a model is trained on: mesh axes, machine descriptions and device meshes."""
