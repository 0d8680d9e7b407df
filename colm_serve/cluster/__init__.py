"""The composition root: Ray actors, their controller, and starting and stopping the lot."""
