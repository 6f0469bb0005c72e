"""What all other packages rest on."""
