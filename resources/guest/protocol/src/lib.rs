//! The framed protocol between bulle and its guest agent.
#![no_std]
