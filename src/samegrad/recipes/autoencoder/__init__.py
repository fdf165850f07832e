"""An autoencoder trained on a data set that does not fit the device: exact full-batch descent, in partitions."""
