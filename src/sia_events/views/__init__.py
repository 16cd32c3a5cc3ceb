"""What people see, as text: fixed width, times UTC."""
