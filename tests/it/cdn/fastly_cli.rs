//! The stub of Fastly's API as an independent client sees it: the Fastly CLI.
