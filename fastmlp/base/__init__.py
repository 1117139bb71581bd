"""What every file of fastmlp may use, and which itself uses none of them but the names of activations."""
