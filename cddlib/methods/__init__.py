"""The methods of trajectory matching as configurations."""
