//! The methods of Lacuna: one small file per published technique, by site, and one registry slice.
#![forbid(unsafe_code)]
