"""Files of weights: the publishers' and our own, read strictly."""
