//! Data paths of virtio devices that want more speed than Python has. Nothing here knows Python, or who is at the other end
//! of a queue: a vhost-user front-end or a transport of our own.

pub mod block;
