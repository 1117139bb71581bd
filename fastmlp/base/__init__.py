"""What every file of fastmlp may import. The files here import nothing else of fastmlp but the activations' names."""
