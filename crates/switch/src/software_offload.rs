//! Completes what a sender left to an offload that the receiver does not accept: checksums and segmentation. The frame is
//! copied into memory of our own first, so that its sender cannot change it under the computation.
