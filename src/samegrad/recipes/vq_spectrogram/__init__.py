"""The vector-quantised autoencoder of spectrograms; ``samegrad run vq_spectrogram``."""
