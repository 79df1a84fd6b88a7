use std::os::unix::net::UnixStream;

use super::*;

#[test]
fn a_path_in_use_is_refused_and_one_left_behind_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let first = Listener::bind(&path, SocketType::Stream).unwrap();
    for kind in [SocketType::Stream, SocketType::Seqpacket] {
        let error = Listener::bind(&path, kind).unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
    }
    UnixStream::connect(&path).unwrap();
    assert!(first.accept().is_ok());
    drop(first);
    assert!(!path.exists());

    // As a killed process leaves it.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let second = Listener::bind(&path, SocketType::Seqpacket).unwrap();
    assert!(
        second
            .accept()
            .is_err_and(|e| e.kind() == ErrorKind::WouldBlock)
    );
    // The path of another socket is not this one's to remove.
    std::fs::remove_file(&path).unwrap();
    let third = Listener::bind(&path, SocketType::Stream).unwrap();
    drop(second);
    assert!(path.exists());
    drop(third);
    assert!(!path.exists());
}

#[test]
fn only_one_of_many_gets_what_was_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || Listener::bind(&path, SocketType::Stream))
        })
        .collect();
    let bound: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    assert_eq!(bound.iter().filter(|bound| bound.is_ok()).count(), 1);
    assert!(UnixStream::connect(&path).is_ok());
}

#[test]
fn what_cannot_be_a_socket_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let bind = |name: &str| Listener::bind(&dir.path().join(name), SocketType::Stream).unwrap_err();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    assert!(matches!(bind("file"), ListenError::Occupied { .. }));
    assert!(matches!(bind("no/s"), ListenError::NoDirectory { .. }));
    assert!(matches!(bind("file/s"), ListenError::System { .. }));
    assert!(matches!(
        bind(&"x".repeat(200)),
        ListenError::TooLong { .. }
    ));
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"x");
}
