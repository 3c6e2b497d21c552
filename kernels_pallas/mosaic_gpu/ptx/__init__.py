"""Device code below Pallas: loops and copies in PTX."""
