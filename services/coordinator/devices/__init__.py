"""The pool of devices: who is in it, which job has which device, and how a device is reached."""
