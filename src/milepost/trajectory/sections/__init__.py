"""The parts of the page below its figures: tables and the sentences that say what they show."""
