"""Images of one mask: a model by name, folder or address; masks of any kind and size; an image in the mask's place."""
