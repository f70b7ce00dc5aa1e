"""From a checkpoint in any container and any spelling to a filled module: `load.load_component`."""
