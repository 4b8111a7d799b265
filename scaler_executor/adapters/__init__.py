"""What other libraries want of an executor beyond its interface. Each module imports the library that it is for."""
