"""What a pod needs, from the TPU compiler."""
