"""What every command shares: its flags, the setting made from them, the memory plan, files, the terminal."""
