"""The engine: chunks of a step whose summed gradients are the plain step's."""
