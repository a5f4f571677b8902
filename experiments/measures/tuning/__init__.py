"""What is measured of a few trainings of a real model beside what foretells them."""
