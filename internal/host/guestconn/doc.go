package guestconn
