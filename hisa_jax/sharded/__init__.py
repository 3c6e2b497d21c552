"""What one device does where keys, pages or queries are split over a mesh."""
