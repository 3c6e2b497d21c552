"""What each method keeps of the flat indexer's selections in a model of the user's, on a text of the user's."""
