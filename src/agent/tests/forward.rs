//! Connections to TCP servers of the guest. The agent of these tests shares the host's loopback, so a server of the test is one of the guest.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// A server, and a connection to it through the agent.
async fn connected(guest: &Guest, address: &str) -> (TcpStream, Box<dyn AsyncStream>) {
    let server = TcpListener::bind((address, 0)).await.unwrap();
    let port = server.local_addr().unwrap().port();
    let (forwarded, accepted) = tokio::join!(guest.agent.forward(port), server.accept());
    let (stream, early) = forwarded.unwrap();
    assert_eq!(early, b"");
    (accepted.unwrap().0, stream)
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let guest = Guest::start().await;
    for address in ["127.0.0.1", "::1", "0.0.0.0", "::"] {
        let (mut server, mut host) = connected(&guest, address).await;
        host.write_all(b"question").await.unwrap();
        host.shutdown().await.unwrap();
        let mut heard = String::new();
        server.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "question", "{address}");
        // The host's direction has ended; the server's goes on.
        server.write_all(b"answer").await.unwrap();
        let mut piece = [0; 6];
        host.read_exact(&mut piece).await.unwrap();
        assert_eq!(&piece, b"answer");
        drop(server);
        assert_eq!(host.read(&mut piece).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn a_server_may_speak_first() {
    let guest = Guest::start().await;
    let server = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = server.local_addr().unwrap().port();
    let banner = async {
        let (mut connection, _) = server.accept().await.unwrap();
        connection.write_all(b"220 ready\r\n").await.unwrap();
    };
    let (forwarded, ()) = tokio::join!(guest.agent.forward(port), banner);
    let (mut stream, mut heard) = forwarded.unwrap();
    stream.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"220 ready\r\n");
}

#[tokio::test]
async fn a_closed_port_is_not_found() {
    let guest = Guest::start().await;
    let free = TcpListener::bind(("127.0.0.1", 0)).await.unwrap().local_addr().unwrap().port();
    let refused = guest.agent.forward(free).await.map(drop).unwrap_err();
    assert!(matches!(&refused, AgentError::NotFound(text) if text.contains(&free.to_string())), "{refused}");
}

#[tokio::test]
async fn a_reader_that_rests_holds_the_writer_back_and_nothing_is_lost() {
    const BYTES: usize = 20 << 20;
    let guest = Guest::start().await;
    let (server, host) = connected(&guest, "127.0.0.1").await;
    let (mut read_server, mut write_server) = server.into_split();
    let (mut read_host, mut write_host) = tokio::io::split(host);
    let pattern = |i: usize| (i % 251) as u8;
    let data: Arc<Vec<u8>> = Arc::new((0..BYTES).map(pattern).collect());
    let mut writers = tokio::task::JoinSet::new();
    let both = [Arc::clone(&data), Arc::clone(&data)];
    let [one, two] = both;
    writers.spawn(async move {
        write_server.write_all(&one).await.unwrap();
        write_server.shutdown().await.unwrap();
    });
    writers.spawn(async move {
        write_host.write_all(&two).await.unwrap();
        write_host.shutdown().await.unwrap();
    });
    // What nobody reads does not all fit into the buffers between them.
    let waited = tokio::time::timeout(Duration::from_millis(200), writers.join_next()).await;
    assert!(waited.is_err());
    let (mut at_host, mut at_server) = (Vec::new(), Vec::new());
    let (a, b) = tokio::join!(read_host.read_to_end(&mut at_host), read_server.read_to_end(&mut at_server));
    assert_eq!((a.unwrap(), b.unwrap()), (BYTES, BYTES));
    assert!(at_host == *data && at_server == *data);
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
}

#[tokio::test]
async fn a_host_that_goes_away_closes_the_connection_of_the_server() {
    let guest = Guest::start().await;
    let (mut server, host) = connected(&guest, "127.0.0.1").await;
    drop(host);
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
    // Also one that has ended its own direction long before, while the server says nothing.
    let (mut server, mut host) = connected(&guest, "127.0.0.1").await;
    host.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
    drop(host);
    // The server learns of it by writing: its connection is gone.
    let gone = async {
        while server.write_all(&[0; 4096]).await.is_ok() {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.unwrap();
}
