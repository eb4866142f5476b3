"""Client for the chats API of a Coder server, usable on its own."""
